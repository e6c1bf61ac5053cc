# syntax=docker/dockerfile:1
# Two images from one file, both non-root and fit for a read-only root file system:
#
#   docker build --target api -t recofuse-api .            HTTP and gRPC, without torch
#   docker build --target worker -t recofuse-worker .      the model; torch brings its CUDA libraries, the host its driver
#
# Every Python package has the version of constraints.txt. The base is a tag here so that it can be read; pin what you
# deploy by digest: --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:... (`docker buildx imagetools inspect`).
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# The front end's packages: in a layer of their own, which a change of the code leaves alone.
FROM base AS api-packages
RUN python -m venv /opt/packages
WORKDIR /build
COPY constraints.txt deploy/requirements-api.txt ./
RUN /opt/packages/bin/pip install -r requirements-api.txt -c constraints.txt

# The worker's: the same and torch. TORCH_INDEX may name another index to take torch from: with PyTorch's own index of
# CPU wheels the image is the CPU variant, several gigabytes smaller. Empty: the default index, whose build has CUDA.
FROM api-packages AS worker-packages
ARG TORCH_INDEX=""
COPY deploy/requirements-worker.txt ./
RUN /opt/packages/bin/pip install -r requirements-worker.txt -c constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"}

# recofuse itself, without what it depends on.
FROM api-packages AS application
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY recofuse_core recofuse_core
COPY recofuse_client recofuse_client
COPY recofuse_images recofuse_images
COPY recofuse_protos recofuse_protos
COPY recofuse_rigs recofuse_rigs
RUN /opt/packages/bin/pip install --no-deps --target /opt/recofuse .

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
ENV PATH=/opt/recofuse/bin:/opt/packages/bin:${PATH} \
    PYTHONPATH=/opt/recofuse \
    HOME=/tmp
WORKDIR /tmp
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["recofuse"]

FROM runtime AS api
COPY --from=api-packages /opt/packages /opt/packages
COPY --from=application /opt/recofuse /opt/recofuse
ENV RECOFUSE_HTTP__HOST=0.0.0.0 \
    RECOFUSE_GRPC__HOST=0.0.0.0
EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/live', timeout=4)"]
CMD ["api"]

FROM runtime AS worker
COPY --from=worker-packages /opt/packages /opt/packages
COPY --from=application /opt/recofuse /opt/recofuse
ENV RECOFUSE_WORKER__METRICS_HOST=0.0.0.0 \
    RECOFUSE_WORKER__METRICS_PORT=9000 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 9000
# Loading and warming the model may take minutes on a cold disk.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9000/health/ready', timeout=4)"]
CMD ["worker"]
