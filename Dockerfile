# syntax=docker/dockerfile:1
# Two images from one file, both non-root and fit for a read-only root file system:
#
#   docker build --target api -t recofuse-api .                    HTTP and gRPC, without the model
#   docker build --target worker -t recofuse-worker:cu130 .        the model; CUDA is in the image, the driver on the host
#   docker build --target worker -t recofuse-worker:cpu --build-arg VARIANT=cpu .   the model on processors, without torch
#
# docs/operations.md says which hosts a variant is for. Every Python package is a wheel whose hash is known: `make lock`
# writes deploy/requirements-*.txt. The base is a tag here so that it can be read; pin what you deploy by digest:
# --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:... (`docker buildx imagetools inspect`).
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# What installs stays behind in this stage.
FROM base AS installer
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/installer && python -m venv --without-pip /opt/packages
WORKDIR /build

# The front end's packages: in a layer of their own, which a change of the code leaves alone. Of numpy, its tests are left
# out.
FROM installer AS api-packages
COPY deploy/requirements-api.txt ./
RUN /opt/installer/bin/pip --python /opt/packages/bin/python install \
    --only-binary :all: --no-deps --require-hashes -r requirements-api.txt \
    && find /opt/packages/lib -path '*/numpy/*' -type d -name tests -prune -exec rm -r {} +

# What a worker has beside them: what runs the model, ONNX Runtime or torch, and what reads and writes pictures. Of torch,
# programs of its tests and what compiles extensions are left out.
FROM installer AS worker-packages
ARG VARIANT=cu130
COPY deploy/requirements-runtime-cpu.txt deploy/requirements-runtime-cu130.txt ./
RUN /opt/installer/bin/pip --python /opt/packages/bin/python install \
    --only-binary :all: --no-deps --require-hashes --target /opt/model -r "requirements-runtime-${VARIANT}.txt" \
    && rm -rf /opt/model/torch/test /opt/model/torch/bin/test_* /opt/model/torch/bin/protoc* /opt/model/torch/include
# Triton compiles its way to the driver where it runs. Its C compiler is a wheel like the others; what is not for glibc on
# Linux is left out. docs/operations.md says which folder it needs besides.
RUN if [ -d /opt/model/ziglang ]; then \
    find /opt/model/ziglang/lib /opt/model/ziglang/lib/libc -mindepth 1 -maxdepth 1 -regextype posix-extended \
    -regex '.*/(docs|libcxx|libcxxabi|libtsan|darwin|mingw|musl|wasi)' -exec rm -r {} + \
    && find /opt/model/ziglang/lib/libc/include -mindepth 1 -maxdepth 1 \
    ! -name '*-linux-gnu' ! -name '*-linux-any' ! -name '*glibc*' -exec rm -r {} + \
    && { echo '#!/bin/sh'; echo "exec /opt/model/ziglang/zig cc -target $(uname -m)-linux-gnu.2.28 \"\$@\""; } \
    > /opt/model/bin/triton-cc && chmod 755 /opt/model/bin/triton-cc; fi
COPY deploy/requirements-worker.txt ./
RUN /opt/installer/bin/pip --python /opt/packages/bin/python install \
    --only-binary :all: --no-deps --require-hashes --target /opt/model -r requirements-worker.txt

# recofuse itself, without what it depends on.
FROM installer AS application
COPY deploy/requirements-build.txt ./
RUN /opt/installer/bin/pip install --only-binary :all: --no-deps --require-hashes -r requirements-build.txt
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY recofuse_core recofuse_core
COPY recofuse_client recofuse_client
COPY recofuse_host recofuse_host
COPY recofuse_images recofuse_images
COPY recofuse_protos recofuse_protos
COPY recofuse_rigs recofuse_rigs
RUN /opt/installer/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/installer/bin/pip --python /opt/packages/bin/python install --no-deps --target /opt/recofuse dist/*.whl

FROM base AS runtime
ARG REVISION=unknown
ARG VERSION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="recofuse" \
      org.opencontainers.image.description="Restores and fuses infrared/visible image pairs" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
# Nothing here installs packages: the base image's own installer goes. The packages of `api` are a layer of `worker`, too.
# The folder is for frames beside Redis: a new volume takes over whose it is (docs/redis.md).
RUN rm -rf /usr/local/bin/pip* /usr/local/bin/wheel /usr/local/lib/python3.*/site-packages/* /usr/local/lib/python3.*/ensurepip \
    && install -d -m 0700 -o 10001 -g 10001 /run/recofuse/frames
COPY --from=api-packages /opt/packages /opt/packages
ENV PATH=/opt/recofuse/bin:/opt/packages/bin:${PATH} \
    PYTHONPATH=/opt/recofuse \
    HOME=/tmp
WORKDIR /tmp
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["recofuse"]

FROM runtime AS api
COPY --from=application /opt/recofuse /opt/recofuse
ENV RECOFUSE_HTTP__HOST=0.0.0.0 \
    RECOFUSE_GRPC__HOST=0.0.0.0
EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/live', timeout=4)"]
CMD ["api"]

FROM runtime AS worker
COPY --from=worker-packages /opt/model /opt/model
COPY --from=application /opt/recofuse /opt/recofuse
# Which GPUs a container sees is for whoever starts it to say. What it sees of their driver is for the image: CUDA, and the
# driver's own report (NVML), but no graphics. CC is for Triton, and there with torch alone.
ENV PYTHONPATH=/opt/recofuse:/opt/model \
    RECOFUSE_WORKER__METRICS_HOST=0.0.0.0 \
    RECOFUSE_WORKER__METRICS_PORT=9000 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CC=/opt/model/bin/triton-cc
EXPOSE 9000
# Loading and warming the model may take minutes on a cold disk.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9000/health/ready', timeout=4)"]
CMD ["worker"]
