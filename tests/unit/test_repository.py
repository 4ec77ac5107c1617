"""The hand-written configs, read with Triton's own schema."""

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from panotriton.server.repository import OPTIONAL, copy_models

ROOT = Path(__file__).parent.parent.parent
CONFIGS = {
    path.parent.name: text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    for path in sorted(ROOT.glob("model_repository/*/config.pbtxt"))
}
ENSEMBLES = [name for name, config in CONFIGS.items() if config.platform == "ensemble"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_what_decides(name: str) -> None:
    config = CONFIGS[name]
    assert config.name == name
    assert (
        'runtime: "model.py"' not in (ROOT / "model_repository" / name / "config.pbtxt").read_text()
    )
    if name in ENSEMBLES:
        assert not config.instance_group
        return
    assert config.backend in ("python", "onnxruntime")
    # Left out, the server would choose, differently on CPU and GPU hosts.
    assert config.instance_group
    if config.max_batch_size:
        assert config.HasField("dynamic_batching")
        assert config.dynamic_batching.default_queue_policy.max_queue_size
    if config.backend == "onnxruntime":  # flattened there, not unstacked
        assert not any(io.allow_ragged_batch for io in config.input)


@pytest.mark.parametrize("name", ENSEMBLES)
def test_every_tensor_of_an_ensemble_is_made_once_and_fits_where_it_goes(name: str) -> None:
    config = CONFIGS[name]
    kinds = {io.name: (io.data_type, list(io.dims)) for io in config.input}
    for step in config.ensemble_scheduling.step:
        for io in CONFIGS[step.model_name].output:
            if io.name in step.output_map:
                assert step.output_map[io.name] not in kinds
                kinds[step.output_map[io.name]] = (io.data_type, list(io.dims))
    for step in config.ensemble_scheduling.step:
        inputs = {io.name: io for io in CONFIGS[step.model_name].input}
        missing = {k for k, io in inputs.items() if not io.optional} - set(step.input_map)
        assert not missing
        for key, value in step.input_map.items():
            assert_fits(kinds[value], (inputs[key].data_type, list(inputs[key].dims)))
    for io in config.output:
        assert_fits(kinds[io.name], (io.data_type, list(io.dims)))


def assert_fits(made: tuple[int, list[int]], taken: tuple[int, list[int]]) -> None:
    assert made[0] == taken[0]
    assert len(made[1]) == len(taken[1])
    assert all(a == b or -1 in (a, b) for a, b in zip(made[1], taken[1], strict=True))


@pytest.mark.parametrize("name", ENSEMBLES)
def test_one_step_alone_can_start_an_ensemble(name: str) -> None:
    """With two, one that fails at once brings this server down."""
    given = {io.name for io in CONFIGS[name].input}
    steps = CONFIGS[name].ensemble_scheduling.step
    first = [step.model_name for step in steps if set(step.input_map.values()) <= given]
    assert first == [steps[0].model_name]


def test_copying_the_code_keeps_what_an_export_has_fitted(tmp_path: Path) -> None:
    fitted = tmp_path / "osediff_unet"
    (fitted / "1").mkdir(parents=True)
    (fitted / "1" / "model.onnx").touch()
    (fitted / "config.pbtxt").write_text("kind: KIND_GPU")
    copy_models(tmp_path)
    assert (fitted / "config.pbtxt").read_text() == "kind: KIND_GPU"
    assert {path.name for path in tmp_path.iterdir()} == set(CONFIGS) - set(OPTIONAL)
