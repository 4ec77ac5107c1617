import dataclasses
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image as PILImage

import panotriton
from panotriton.client import calls
from panotriton.client.client import Client
from panotriton.client.pixels import Images, pixels
from panotriton.errors import ConnectError, InvalidImage, InvalidInput, PanotritonError
from panotriton.groups.folder import next_group_id, write_group
from panotriton.pipeline.camera import sample_cameras
from panotriton.pipeline.contract import Options
from panotriton.pipeline.group import interpolate_cameras
from panotriton.pipeline.images import decode_image
from panotriton.pipeline.results import Group, Timings, group_from_tensors
from tests.pictures import PROFILES, exif

RNG = np.random.default_rng(0)
PROTOCOLS = ("grpc", "http")


def test_public_names_are_pinned() -> None:
    assert panotriton.__all__ == [
        "AsyncClient",
        "AsyncSharedMemory",
        "Camera",
        "Client",
        "ConnectError",
        "Cropped",
        "Description",
        "ExportError",
        "Group",
        "Health",
        "InferenceFailed",
        "Interval",
        "InvalidImage",
        "InvalidInput",
        "Model",
        "ModelUnavailable",
        "Pair",
        "PanotritonError",
        "RequestTimeout",
        "Score",
        "Sequence",
        "ServerBusy",
        "ServerStartError",
        "ServerUnavailable",
        "SharedMemory",
        "SharedMemoryError",
        "StageTime",
        "Timings",
        "Tls",
        "Upscaled",
        "crop",
        "events",
        "lerp",
        "sample_cameras",
    ]
    assert all(hasattr(panotriton, name) for name in panotriton.__all__)
    assert {*panotriton.__all__, "__version__"} <= {*dir(panotriton)}
    with pytest.raises(AttributeError, match="'panotriton' has no attribute 'Nothing'"):
        getattr(panotriton, "Nothing")  # noqa: B009, which type checkers would see


def test_what_a_models_process_imports_brings_no_client() -> None:
    """Twelve such processes belong to a server: gRPC would cost each a third of its start and 16 MB."""
    code = """
import sys, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
import panotriton.models.requests, panotriton.models.super_resolution
print([name for name in sys.modules if name.startswith(("grpc", "tritonclient"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_unreachable_server_is_named(protocol: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{unused.getsockname()[1]}"
    with (
        Client(url, protocol=protocol) as client,
        pytest.raises(ConnectError, match=f"{url}.*panotriton serve") as caught,
    ):
        assert not client.ready()
        client.statistics()
    assert caught.value.__cause__ is not None


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held = []
        thread = threading.Thread(target=lambda: held.append(listener.accept()), daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        for connection, _ in held:
            connection.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_silent_server_does_not_hang_the_client(protocol: str, silent_server: str) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    with (
        Client(silent_server, protocol=protocol, timeout_s=1) as client,
        pytest.raises(PanotritonError, match=silent_server),
    ):
        client.process(image, image)


@pytest.mark.parametrize("arguments", [{"url": "http://localhost:8000"}, {"protocol": "ftp"}])
def test_bad_addresses_are_refused_at_once(arguments: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match="expected"):
        Client(**arguments)


def group_call(
    one: object,
    two: object,
    *,
    seed: int | None = 1,
    cameras: object = None,
    intermediates: bool = False,
    **options: object,
) -> calls.Call[Group]:
    chosen = Options(**({"crop_size": 64, "interpolations": 2} | options))  # type: ignore[arg-type]
    return calls.process(
        one,  # type: ignore[arg-type]
        two,  # type: ignore[arg-type]
        seed=seed,
        cameras=cameras,  # type: ignore[arg-type]
        options=chosen,
        intermediates=intermediates,
    )


def test_panoramas_of_every_kind(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (64, 128, 3), np.uint8)
    path = tmp_path / "a.png"
    PILImage.fromarray(pixels).save(path)
    encoded = group_call(path, str(path))
    assert encoded.model == "panorama_encoded"
    assert encoded.inputs["ENCODED_1"].item() == path.read_bytes()  # type: ignore[union-attr]
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    for one, two in ((PILImage.fromarray(pixels), path), (tensor, tensor.half())):
        raw = group_call(one, two)
        assert raw.model == "panorama"
        for name in ("PANORAMA_1", "PANORAMA_2"):
            image = raw.inputs[name]
            assert isinstance(image, Images)
            np.testing.assert_array_equal(image.joined(), pixels)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((64, 64, 3), np.float32), "panorama_1 is float32; expected uint8"),
        (np.zeros((64, 64), np.uint8), r"panorama_1 has shape \(64, 64\)"),
        (np.zeros((3, 64, 64), np.uint8), "panorama_1 has 64 channels"),
        (np.zeros((64, 64, 4), np.uint8), "drop alpha"),
        (np.zeros((64, 32, 3), np.uint8), "32×64 px; expected at least 64"),
        (PILImage.new("HSV", (64, 64)), r"mode HSV; expected RGB, RGBA, .*convert\('RGB'\)"),
        (b"bytes", "panorama_1 is a bytes"),
        (Path("/nowhere.jpg"), "cannot read /nowhere.jpg: No such file"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), "torch tensor of torch.uint8; expected floats"),
        (torch.zeros(64, 64, 3), r"shape \(64, 64, 3\); expected \(3, H, W\)"),
        (torch.zeros(1, 3, 64, 64), "send several as a list"),
        (torch.full((3, 64, 64), 255.0), "values from 255 to 255; expected .*divide"),
        (torch.full((3, 64, 64), torch.nan), "values from nan to nan"),
        (torch.zeros(3, 64, 32), "32×64 px; expected at least 64"),
    ],
)
def test_anything_else_is_refused_by_name(image: object, says: str) -> None:
    with pytest.raises(InvalidImage, match=says):
        group_call(image, np.zeros((64, 64, 3), np.uint8))


def test_seed_and_cameras_exclude_each_other() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    with Client("127.0.0.1:1") as client:
        with pytest.raises(InvalidInput, match="both given"):
            client.process(image, image, seed=1, cameras=sample_cameras(1))
        with pytest.raises(InvalidInput, match="seed is -1"):
            client.process(image, image, seed=-1)
        with pytest.raises(InvalidInput, match=r"cameras has shape \(1, 5\)"):
            client.process(image, image, cameras=np.zeros((1, 5)))


@pytest.mark.parametrize("extension", [".jpg", ".png", ".webp"])
def test_decoding(extension: str) -> None:
    pixels = np.full((64, 80, 3), (200, 100, 50), np.uint8)
    data = cv2.imencode(extension, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()
    decoded = decode_image("X", data)
    assert decoded.shape == (64, 80, 3)
    assert np.abs(decoded.astype(int) - pixels).max() <= 3
    with pytest.raises(InvalidImage, match="X is a broken image|X holds"):
        decode_image("X", data[: len(data) // 2])


def test_pil_images_are_turned_and_arrays_taken_as_they_are(tmp_path: Path) -> None:
    stored = RNG.integers(0, 256, (96, 160, 3), np.uint8)
    PILImage.fromarray(stored).save(tmp_path / "a.png", exif=exif(6))
    upright = np.rot90(stored, -1)
    for image, expected in (
        (tmp_path / "a.png", upright),
        (PILImage.open(tmp_path / "a.png"), upright),
        (PILImage.fromarray(stored), stored),
        (PILImage.fromarray(stored).convert("RGBA"), stored),
        (PILImage.fromarray(stored[..., 0]).convert("PA"), stored[..., :1].repeat(3, -1)),
        (stored, stored),
    ):
        np.testing.assert_array_equal(pixels("X", image), expected)


@pytest.mark.parametrize("profile", ["none", "wide", "grey", "inks"])
@pytest.mark.parametrize("mode", ["I;16", "1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_pil_images_are_the_pixels_of_their_files(tmp_path: Path, mode: str, profile: str) -> None:
    ramp = np.arange(96 * 160, dtype=np.uint16).reshape(96, 160) * 4
    rgb = PILImage.fromarray(RNG.integers(0, 256, (96, 160, 3), np.uint8))
    image = PILImage.fromarray(ramp) if mode == "I;16" else rgb.convert(mode)
    path = tmp_path / "a.tiff"
    image.save(path, icc_profile=PROFILES[profile], exif=exif(6))
    with PILImage.open(path) as opened:
        assert opened.mode == mode
        got = pixels("X", opened)
    np.testing.assert_array_equal(got, pixels("X", path))
    if mode == "I;16" and profile == "none":
        np.testing.assert_array_equal(got[..., 0], np.rot90(np.rint(ramp / 257), -1))


def test_pil_images_that_cannot_be_taken_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PILImage.fromarray(RNG.integers(0, 256, (96, 160, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with PILImage.open(path) as broken:
        for image, says in (
            (broken, "X is a broken image"),
            (PILImage.new("F", (64, 64)), "X is a picture of mode F; .* scale it to 0…255"),
            (PILImage.new("L", (64, 32)), "X is 64×32 px; expected at least 64"),
        ):
            with pytest.raises(InvalidImage, match=says):
                pixels("X", image)


def example_group(kept: list[int], count: int = 2) -> Group:
    cameras = sample_cameras(4)
    between = interpolate_cameras(cameras, np.array(kept, np.int32), count)
    n = len(kept) * 2 * count
    tensors = {
        "CAMERAS": cameras,
        "PAIRS": RNG.integers(0, 256, (16, 8, 16, 3), np.uint8),
        "PAIRS_SR": RNG.integers(0, 256, (16, 16, 32, 3), np.uint8),
        "SCORE": np.array([0.75, *[0.9] * 14, np.nan], np.float32),
        "SUB_SCORES": np.full((16, 5), 0.5, np.float32),
        "RAW_OUTPUT": np.array([b"reply"] * 16, np.object_),
        "KEPT": np.array(kept, np.int32),
        "DESCRIPTION": np.array([b"A room."] * len(kept), np.object_),
        "DESCRIPTION_ERROR": np.array([b""] * len(kept), np.object_),
        "INTERPOLATED": RNG.integers(0, 256, (n, 8, 8, 3), np.uint8),
        "INTERPOLATED_CAMERAS": between,
        "INTERPOLATED_SR": np.arange(n, dtype=np.uint8)[:, None, None, None]
        .repeat(16, 1)
        .repeat(16, 2)
        .repeat(3, 3),
    }
    return group_from_tensors(tensors, Timings(1500.0))


def test_a_group_is_assembled_in_order() -> None:
    group = example_group([2, 5])
    assert group.kept == (2, 5)
    assert group.image_count == 2 * 2 * 4
    assert group.pairs[0].quality.final_score == 0.75
    sequence = group.intervals[1].sequences[0]  # interval 5 of panorama 1: views 4 and 5
    assert [int(image[0, 0, 0]) for image in sequence.images[1:-1]] == [4, 5]
    pair = group.pairs[4]
    np.testing.assert_array_equal(sequence.images[0], pair.sharp[:, :16])
    np.testing.assert_array_equal(sequence.images[-1], pair.sharp[:, 16:])
    assert sequence.cameras[0] == pair.left
    assert sequence.cameras[-1] == pair.right
    assert len(sequence.cameras) == 4


def test_a_group_folder_has_the_documented_layout(tmp_path: Path) -> None:
    folder = write_group(example_group([2, 5]), tmp_path, ("a", "b"), {"seed": 4})
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    stem = "b_yaw05_pair"
    assert {
        "group_info.json",
        f"pairs/{stem}.jpg",
        f"osediff/{stem}.jpg",
        "params/shared_right_params.json",
        "params/panorama1_left_params.json",
        "params/a_yaw02_left_params.json",
        "params/b_yaw05_right_params.json",
        f"descriptions/{stem}.json",
        f"interpolated/{stem}_left.jpg",
        f"interpolated/{stem}_right.jpg",
        f"interpolated/{stem}_left_interp_01.jpg",
        f"interpolated_sr/{stem}_left_interp_02.jpg",
    } <= files
    assert not [name for name in files if ".tmp" in name or "/." in name]
    info = json.loads((folder / "group_info.json").read_text())
    assert info["seed"] == 4
    assert info["kept"] == [2, 5]
    assert info["scores"][15]["final_score"] is None  # NaN is no JSON
    for interval in info["intervals"]:
        for sequence in interval["sequences"]:
            assert [view["weight_idx"] for view in sequence["images"]] == [0, 1, 2, 3]
            assert all((folder / view["path"]).is_file() for view in sequence["images"])


def test_a_warning_is_kept_with_its_group(tmp_path: Path) -> None:
    group = example_group([])
    warned = dataclasses.replace(group, warning="PROMPT is read up to character 9")
    for one in (group, warned):
        write_group(one, tmp_path, ("a", "b"), {})
    first, second = (
        json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/group_info.json"))
    )
    assert "warning" not in first
    assert second["warning"] == "PROMPT is read up to character 9"


def test_groups_that_are_written_at_once_are_all_there(tmp_path: Path) -> None:
    def write(number: int) -> Path:
        return write_group(example_group([number]), tmp_path, ("a", "b"), {"seed": number})

    with ThreadPoolExecutor(8) as pool:
        folders = [*pool.map(write, range(1, 9))]
    assert len({*folders}) == 8
    seeds = [json.loads((folder / "group_info.json").read_text())["seed"] for folder in folders]
    assert seeds == [*range(1, 9)]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [entry["group_id"] for entry in results] == [*range(1, 9)]
    assert sorted(entry["kept"] for entry in results) == [[number] for number in range(1, 9)]


def test_results_grow_and_a_group_written_again_is_replaced(tmp_path: Path) -> None:
    assert next_group_id(tmp_path) == 1
    write_group(example_group([1]), tmp_path, ("a", "a"), {})
    write_group(example_group([]), tmp_path, ("a", "a"), {})
    write_group(example_group([3]), tmp_path, ("a", "a"), {}, group_id=1)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(entry["group_id"], entry["kept"]) for entry in results] == [(1, [3]), (2, [])]
    assert (tmp_path / "group_0001" / "pairs" / "a_2_yaw01_pair.jpg").is_file()
    assert next_group_id(tmp_path) == 3
