"""What every client keeps to, whichever protocol it speaks: real sockets, a real server, a fake engine."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import trustme

import recofuse_client as rc
from recofuse_rigs.rig import Rig, to_json
from recofuse_rigs.warp import warp_of
from service.access.keys import FileKeys, Scope, new_key
from service.work.engine import EngineInfo
from tests.client.conftest import Served, served
from tests.client.reach import KINDS, QUICK
from tests.fakes import FakeEngine, TellingCodec, file_of, pair, picture
from tests.service.conftest import Serving

pytestmark = pytest.mark.parametrize("kind", KINDS)

VIS, IR = picture(), picture(channels=1, seed=1)
VIS_FILE, IR_FILE = pair()


# pictures


async def test_pixels_go_and_come_back_as_they_are(running: Served, kind: str) -> None:
    client = running.reach.client(kind)
    fusion = await client.fuse(VIS, IR, output="all")
    assert [*fusion.pictures] == [rc.Part.FUSED, rc.Part.VIS, rc.Part.IR]
    np.testing.assert_array_equal(fusion.fused, VIS)
    np.testing.assert_array_equal(fusion.vis, VIS)
    np.testing.assert_array_equal(fusion.ir, IR)
    assert (fusion.model_name, fusion.model_version) == ("fake", "7")
    assert fusion.job_id
    assert fusion.request_id
    assert 0 < fusion.timings.model_s < 20
    assert 0 < fusion.timings.decode_s < 20
    swapped = await client.fuse(np.ascontiguousarray(VIS[..., ::-1]), IR, bgr=True)
    np.testing.assert_array_equal(swapped.fused, VIS)
    grey = await client.fuse(VIS[..., 0], IR[..., None])
    np.testing.assert_array_equal(grey.fused, np.repeat(VIS[..., :1], 3, axis=2))


async def test_deep_pixels_arrive_deep(running: Served, kind: str) -> None:
    client = running.reach.client(kind)
    ramp = np.linspace(7000, 9500, 64 * 48).reshape(48, 64).astype(np.uint16)
    fusion = await client.fuse(VIS, ramp, output="ir", ir_range=(7000.0, 9500.0))
    expected = np.rint((ramp - 7000.0) / 2500 * 255)
    np.testing.assert_array_equal(fusion.ir, expected)
    scaled = await client.fuse(VIS.astype(np.uint16) * 16, IR, output="vis", vis_range=(400.5, 3600))
    np.testing.assert_array_equal(scaled.vis, np.rint(np.clip((VIS * 16.0 - 400.5) / 3199.5, 0, 1) * 255))
    deep = VIS.astype(np.uint16) * 257
    np.testing.assert_array_equal((await client.fuse(deep, IR)).fused, VIS)


async def test_files_bytes_and_paths(running: Served, kind: str, tmp_path: Path) -> None:
    client = running.reach.client(kind)
    (tmp_path / "vis.png").write_bytes(VIS_FILE)
    (tmp_path / "ir.png").write_bytes(IR_FILE)
    for vis, ir in (
        (VIS_FILE, bytearray(IR_FILE)),
        (tmp_path / "vis.png", str(tmp_path / "ir.png")),
        (memoryview(VIS_FILE), IR),
    ):
        np.testing.assert_array_equal((await client.fuse(vis, ir)).fused, VIS)
    with pytest.raises(FileNotFoundError):
        await client.fuse(tmp_path / "none.png", IR)
    with pytest.raises(TypeError, match="not float64"):
        await client.fuse(VIS / 255, IR)
    with pytest.raises(TypeError, match="not int"):
        await client.fuse(VIS, 7)
    with pytest.raises(ValueError, match=r"ir: accepted are .* not \(48, 64, 2\)"):
        await client.fuse(VIS, np.zeros((48, 64, 2), np.uint8))


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
async def test_files_as_answers(running: Served, kind: str, image_format: Any) -> None:
    fusion = await running.reach.client(kind).fuse(VIS, IR, format=image_format, output="all")
    for part, shape in (("fused", (48, 64, 3)), ("vis", (48, 64, 3)), ("ir", (48, 64))):
        shown = fusion[part]
        assert shown.media_type == f"image/{image_format}"
        assert cv2.imdecode(np.frombuffer(shown.encoded, np.uint8), cv2.IMREAD_UNCHANGED) is not None
        assert shown.pixels.shape == shape
        source = IR if part == "ir" else VIS
        assert np.abs(shown.pixels.astype(int) - source).mean() <= (0 if image_format == "png" else 12)


async def test_single_pictures_carry_their_names(running: Served, kind: str) -> None:
    client = running.reach.client(kind)
    for output in ("fused", "vis", "ir"):
        for image_format in ("array", "png"):
            fusion = await client.fuse(VIS, IR, output=output, format=image_format)
            assert [*fusion.pictures] == [output]
    with pytest.raises(KeyError):
        _ = fusion.fused
    with pytest.raises(ValueError, match="pixels"):
        _ = (await client.fuse(VIS, IR))["fused"].encoded


async def test_options_reach_the_engine(running: Served, kind: str) -> None:
    client = running.reach.client(kind)
    await client.fuse(VIS, IR, steps=17, sampler="euler", seed=99, priority="high")
    assert running.engine.batches[-1] == [99]
    assert (running.engine.options[-1].steps, running.engine.options[-1].sampler) == (17, "euler")
    for exposure, expected in (("as_shot", "as_shot"), ("lit", "lit"), (None, running.engine.info.default_exposure)):
        await client.fuse(VIS, IR, exposure=exposure)
        assert running.engine.options[-1].exposure == expected
    job = await client.submit(VIS, IR, exposure="lit")
    await client.wait(job.id)
    assert running.engine.options[-1].exposure == "lit"
    for wrong in (
        {"output": "both"}, {"format": "bmp"}, {"sampler": "magic"}, {"exposure": "bright"}, {"priority": "urgent"}
    ):  # fmt: skip
        with pytest.raises(ValueError, match="accepted are"):
            await client.fuse(VIS, IR, **wrong)
    for odd in ({"seed": -1}, {"seed": 2**63}, {"steps": 0}, {"steps": 1001}):
        with pytest.raises(ValueError, match="accepted are"):
            await client.fuse(VIS, IR, **odd)


async def test_a_rig_goes_as_name_file_text_or_matrix(serving: Serving, kind: str, tmp_path: Path) -> None:
    rig = Rig((64, 48), (80, 80), (0.5, 0.0, 10.0, 0.0, 0.5, 4.0, 0.0, 0.0, 1.0), name="roof")
    (tmp_path / "roof.json").write_text(to_json(rig))
    counts = (picture(80, 80, channels=1, seed=3).astype(np.uint16) << 4) + 7000
    expected = np.clip(np.rint((warp_of(rig).apply(counts) - 7000.0) / 4080 * 255), 0, 255)
    async with served(serving, rigs={"directory": str(tmp_path)}) as running:
        client = running.reach.client(kind)
        asked: dict[str, Any] = {"output": "all", "ir_range": (7000.0, 11080.0)}
        for given in ("roof", to_json(rig), tmp_path / "roof.json", rig.array, rig.array.tolist()):
            fusion = await client.fuse(VIS, counts, rig=given, **asked)
            np.testing.assert_array_equal(fusion.ir, expected)
            assert fusion.fused.shape == VIS.shape
        job = await client.submit(VIS, counts, rig="roof", **asked)
        np.testing.assert_array_equal((await client.wait(job.id)).ir, expected)
        if kind.startswith("grpc"):
            results = await client.stream([(VIS, counts)] * 2, rig="roof", **asked)
            for result in results:
                np.testing.assert_array_equal(result.unwrap().ir, expected)
        (told,) = await client.rigs()
        assert told == rc.Rig(
            name="roof", vis_size=(64, 48), ir_size=(80, 80), overlap=round(rig.overlap, 3), is_sure=True,
            spread_px=0.0, residual_px=0.0, num_pairs=0, method="matrix", date="", matrix=rig.matrix,
        )  # fmt: skip
        with pytest.raises(rc.InvalidInputError, match="rig: there is no rig cellar; there are roof"):
            await client.fuse(VIS, counts, rig="cellar")
        with pytest.raises(rc.InvalidInputError, match=r"64x48.*80x80"):
            await client.fuse(VIS, counts)
        for wrong in (np.eye(2), np.full((3, 3), np.nan), "", "   ", "dächer"):
            with pytest.raises(ValueError, match="rig: accepted"):
                await client.fuse(VIS, counts, rig=wrong)
        with pytest.raises(FileNotFoundError):
            await client.fuse(VIS, counts, rig=tmp_path / "none.json")


# errors


async def test_refusals_are_the_servers_own_words(running: Served, kind: str) -> None:
    client = running.reach.client(kind, retry=QUICK)  # none of these may be tried again
    with pytest.raises(rc.UnsupportedMediaError, match="vis: not a readable image") as unreadable:
        await client.fuse(b"no picture", IR)
    assert unreadable.value.request_id
    assert isinstance(unreadable.value, rc.RequestError)
    with pytest.raises(rc.InvalidInputError, match=r"64x48.*64x64"):
        await client.fuse(VIS, picture(64, 64, channels=1))
    with pytest.raises(rc.InvalidInputError, match="ir_range"):
        await client.fuse(VIS, IR, ir_range=(9.0, 1.0))
    with pytest.raises(rc.InvalidInputError, match="vis_range"):
        await client.fuse(VIS, IR, vis_range=(9.0, 1.0))
    with pytest.raises(rc.JobNotFoundError):
        await client.job("0" * 36)
    with pytest.raises((rc.InvalidInputError, ValueError)):
        await client.job("../models")
    assert not running.engine.batches


async def test_what_was_read_of_the_infrared_file_is_told(
    serving: Serving, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, odd = (file_of(picture(channels=1, seed=seed)) for seed in (7, 8))
    warnings = ("ir: 暖かい, in colour; 100%2C", "a second, plain one")
    TellingCodec.serve(monkeypatch, {raw: ("raw", ()), odd: ("palette", warnings)})
    async with served(serving) as running:
        client = running.reach.client(kind)
        for ir, source, told in ((IR, "grey", ()), (raw, "raw", ()), (odd, "palette", warnings)):
            for output in ("fused", "all"):
                fusion = await client.fuse(VIS, ir, output=output)
                assert (fusion.ir_source, fusion.warnings) == (source, told)
            fusion = await client.wait((await client.submit(VIS, ir)).id)
            assert (fusion.ir_source, fusion.warnings) == (source, told)
        if kind.startswith("grpc"):
            results = await client.stream([(VIS, IR), (VIS, odd)], mode="all")
            seen = [(result.unwrap().ir_source, result.unwrap().warnings) for result in results]
            assert seen == [("grey", ()), ("palette", warnings)]


async def test_workers_that_say_nothing_of_the_infrared_file(serving: Serving, kind: str) -> None:
    """Of an older release, or of a newer one with a word that is not known here."""
    for word in ("", "radar"):
        assert await _told_by_a_worker_that_says(serving, kind, word) == ("", ())


async def _told_by_a_worker_that_says(serving: Serving, kind: str, word: str) -> tuple[str, tuple[str, ...]]:
    class OtherWords(TellingCodec):
        def decode(self, job: Any) -> Any:
            decoded = super().decode(job)
            return replace(decoded, pair=replace(decoded.pair, ir_source=word))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        OtherWords.serve(patch, {})
        async with served(serving) as running:
            fusion = await running.reach.client(kind).fuse(VIS, IR)
    return fusion.ir_source, fusion.warnings


async def test_a_model_may_have_any_name(serving: Serving, kind: str) -> None:
    class Named(FakeEngine):
        @property
        def info(self) -> EngineInfo:
            return replace(super().info, model_name="夜 %20\n", model_version="1 µ")

    async with served(serving, Named()) as running:
        fusion = await running.reach.client(kind).fuse(VIS, IR)
        assert (fusion.model_name, fusion.model_version) == ("夜 %20\n", "1 µ")


async def test_a_failing_model_is_an_internal_error(serving: Serving, kind: str) -> None:
    async with served(serving, FakeEngine(poison_seeds=frozenset({13}), max_fit=1)) as one:
        client = one.reach.client(kind, retry=QUICK)
        with pytest.raises(rc.InternalError, match="request id"):
            await client.fuse(VIS, IR, seed=13)
        job = await client.submit(VIS, IR, seed=13)
        with pytest.raises(rc.InternalError):
            await client.wait(job.id)
        seen = await client.job(job.id)
        assert seen.status is rc.JobStatus.FAILED
        assert isinstance(seen.error, rc.InternalError)


async def test_a_deadline_ends_the_call_and_its_job(running: Served, kind: str) -> None:
    running.engine.gate.clear()
    client = running.reach.client(kind, retry=QUICK)
    with pytest.raises(rc.TimedOutError):
        await client.fuse(VIS, IR, timeout_s=0.4)
    with pytest.raises(ValueError, match="timeout"):
        await client.fuse(VIS, IR, timeout_s=0)
    running.engine.gate.set()
    await client.fuse(VIS, IR, timeout_s=20)


async def test_closing(running: Served, kind: str) -> None:
    client = running.reach.client(kind)
    await client.health()
    await client.close()
    with pytest.raises(RuntimeError, match="closed"):
        await client.health()


# jobs


async def test_a_job_from_submission_to_pictures(running: Served, kind: str) -> None:
    client = running.reach.client(kind)
    running.engine.gate.clear()
    job = await client.submit(VIS, IR, seed=4, priority="high", output="all", job_timeout_s=30)
    assert job.status in (rc.JobStatus.QUEUED, rc.JobStatus.RUNNING)
    assert not job.status.is_final
    assert job.priority == "high"
    assert job.deadline_at is not None
    assert (job.deadline_at - job.created_at).total_seconds() == pytest.approx(30, abs=1e-3)
    with pytest.raises(rc.NotFinishedError):
        await client.result(job.id)
    with pytest.raises(rc.TimedOutError):
        await client.wait(job.id, timeout_s=0.3)
    waiting = asyncio.ensure_future(client.wait(job.id))
    running.engine.gate.set()
    np.testing.assert_array_equal((await waiting).ir, IR)
    seen = await client.job(job.id)
    assert (seen.status, seen.attempts, seen.error) == (rc.JobStatus.SUCCEEDED, 1, None)
    assert seen.finished_at is not None
    np.testing.assert_array_equal((await client.result(job.id)).fused, VIS)
    assert (await client.cancel(job.id)).status is rc.JobStatus.SUCCEEDED


async def test_a_job_is_cancelled(running: Served, kind: str) -> None:
    client = running.reach.client(kind)
    running.engine.gate.clear()
    await client.submit(VIS, IR)
    job = await client.submit(VIS, IR, steps=2)
    cancelled = await client.cancel(job.id)
    assert cancelled.status is rc.JobStatus.CANCELLED
    assert cancelled.status.is_final
    running.engine.gate.set()
    with pytest.raises(rc.CancelledError):
        await client.wait(job.id)


async def test_keys_make_one_job_of_repeats(running: Served, kind: str) -> None:
    client = running.reach.client(kind)
    fusions = await asyncio.gather(*(client.fuse(VIS, IR, seed=6, idempotency_key="k") for _ in range(4)))
    assert len({fusion.job_id for fusion in fusions}) == 1
    assert running.engine.batches == [[6]]
    with pytest.raises(rc.ConflictError):
        await client.fuse(VIS, IR, seed=7, idempotency_key="k")
    jobs = [await client.submit(VIS, IR, idempotency_key="j") for _ in range(2)]
    assert jobs[0].id == jobs[1].id
    assert (await client.submit(VIS, IR)).id != (await client.submit(VIS, IR)).id


# what is there


async def test_models_and_health(running: Served, kind: str) -> None:
    client = running.reach.client(kind)
    (model,) = await client.models()
    assert (model.name, model.version, model.default_steps, model.default_sampler) == ("fake", "7", 3, "ode1")
    assert (model.devices, model.num_workers) == (("none",), 1)
    assert (model.default_exposure, model.exposures) == (running.engine.info.default_exposure, ("as_shot", "lit"))
    assert (await client.health()).is_ready


# trying again


async def test_a_full_queue_is_waited_for(serving: Serving, kind: str) -> None:
    async with served(serving, queue={"max_jobs": 1, "retry_after_s": 0.1}) as one:
        one.engine.gate.clear()
        client = one.reach.client(kind)
        await client.submit(VIS, IR)
        await asyncio.to_thread(one.engine.started.wait, 10)
        with pytest.raises(rc.OverloadedError) as full:
            await client.fuse(VIS, IR, seed=1)
        assert isinstance(full.value, rc.RefusedError)
        assert full.value.retry_after_s is not None
        assert await one.num_refused("overloaded") == 1
        patient = one.reach.client(kind, retry=QUICK)
        waiting = asyncio.ensure_future(patient.fuse(VIS, IR, seed=2))
        while await one.num_refused("overloaded") < 2:  # noqa: ASYNC110 - the server's, not ours
            await asyncio.sleep(0.01)
        one.engine.gate.set()
        np.testing.assert_array_equal((await waiting).fused, VIS)
        assert one.engine.batches[-1] == [2]


async def test_patience_ends_with_the_deadline(serving: Serving, kind: str) -> None:
    async with served(serving, queue={"max_jobs": 1, "retry_after_s": 100.0}) as one:
        one.engine.gate.clear()
        client = one.reach.client(kind, retry=QUICK)
        await client.submit(VIS, IR)
        with pytest.raises(rc.OverloadedError):  # told to wait for longer than there is
            await client.fuse(VIS, IR, timeout_s=15)


async def test_a_server_that_stops_refuses(running: Served, kind: str) -> None:
    running.engine.gate.clear()
    client = running.reach.client(kind)
    held = asyncio.ensure_future(client.fuse(VIS, IR))
    await asyncio.to_thread(running.engine.started.wait, 10)
    running.server.stop.set()
    while (health := await client.health()).is_ready:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    if kind.startswith("http"):
        assert health.reason == "draining"
    with pytest.raises(rc.UnavailableError, match="stopping"):
        await client.fuse(VIS, IR)
    running.engine.gate.set()
    np.testing.assert_array_equal((await held).fused, VIS)


# keys and TLS


async def test_api_keys(serving: Serving, kind: str, tmp_path: Path) -> None:
    store = FileKeys(tmp_path / "keys.json")
    async with served(serving, auth={"keys": f"file:{tmp_path / 'keys.json'}", "cache_s": 0}) as one:
        record, key = new_key("camera", rate_per_s=1.0, burst=1)
        slow, seldom = new_key("seldom", rate_per_s=0.001, burst=1)
        reader, reading = new_key("dashboard", scopes=(Scope.READ,))
        for entry in (record, slow, reader):
            await store.put(entry)
        with pytest.raises(rc.UnauthenticatedError, match="API key"):
            await one.reach.client(kind).fuse(VIS, IR)
        assert (await one.reach.client(kind).health()).is_ready  # needs none
        with pytest.raises(rc.PermissionDeniedError):
            await one.reach.client(kind, api_key=reading).fuse(VIS, IR)
        assert await one.reach.client(kind, api_key=reading).models()
        patient = one.reach.client(kind, api_key=key, retry=QUICK)
        await asyncio.gather(*(patient.fuse(VIS, IR) for _ in range(2)))  # waits as it is told to
        hasty = one.reach.client(kind, api_key=seldom)
        await hasty.fuse(VIS, IR)
        with pytest.raises(rc.RateLimitedError) as limited:
            await hasty.fuse(VIS, IR)
        assert limited.value.retry_after_s is not None
        assert limited.value.retry_after_s > 100


async def test_tls_with_certificates_on_both_sides(serving: Serving, kind: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name, host in (("server", "127.0.0.1"), ("client", "client.example")):
        certificate = authority.issue_cert(host)
        certificate.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
        certificate.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))
    ca, files = str(tmp_path / "ca.pem"), [str(tmp_path / f"client.{kind}") for kind in ("pem", "key")]
    face = {
        "tls_cert": str(tmp_path / "server.pem"), "tls_key": str(tmp_path / "server.key"), "tls_client_ca": ca
    }  # fmt: skip
    async with served(serving, tls=True, http=dict(face), grpc=dict(face)) as one:
        known = one.reach.client(kind, ca=ca, cert=files[0], key=files[1])
        np.testing.assert_array_equal((await known.fuse(VIS, IR)).fused, VIS)
        for stranger in ({"ca": ca}, {}):  # shows nothing; does not know the authority
            with pytest.raises(rc.TransportError):
                await one.reach.client(kind, timeout_s=5, **stranger).fuse(VIS, IR)


async def test_deep_files_of_other_makers_pass_through(running: Served, kind: str) -> None:
    tiff = file_of(np.full((48, 64), 30000, np.uint16), ".tiff")
    buffer = io.BytesIO(tiff)
    fusion = await running.reach.client(kind).fuse(VIS, buffer.getvalue(), output="ir", ir_range=(20000, 40000))
    assert set(np.unique(fusion.ir)) == {128}
