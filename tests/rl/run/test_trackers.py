"""What trackers are told: TensorBoard for real, the others by the calls that Accelerate's classes make of them."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import PartialState

from imagerl.rl.errors import ImageRLError
from imagerl.rl.files.grids import image_grid, save_image
from imagerl.rl.run.trackers import Trackers, refuse_missing

CAPTIONS = ["a sign", "a cat"]
SETTINGS = {"run": {"steps": 4}, "rewards": [{"name": "ocr"}]}


OFFLINE = {  # how each is kept on this machine, below the working directory
    "wandb": {"WANDB_MODE": "offline"},
    "trackio": {"TRACKIO_DIR": "trackio", "HF_HUB_OFFLINE": "1"},
    "mlflow": {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"},
    "swanlab": {"SWANLAB_MODE": "offline"},
}


class Recorder:
    """A stand-in for a tracker's package and for its run: it keeps every call with its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.info = SimpleNamespace(run_id="run-7")

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            if name in ("Image", "Table", "Text"):
                return SimpleNamespace(kind=name, args=args, **kwargs)
            return [] if name == "search_experiments" else self

        return call


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Recorder:
    """The package that `request.param` names, as a recorder."""
    recorder = Recorder()
    module = ModuleType(request.param)
    for name in ("init", "alert", "Image", "Table", "Text", "log_artifact", "log_metrics", "log_dict"):
        setattr(module, name, getattr(recorder, name))
    for name in ("search_experiments", "create_experiment", "start_run", "end_run", "set_tag", "log_text"):
        setattr(module, name, getattr(recorder, name))
    module.config = (
        SimpleNamespace(update=recorder.update) if request.param != "swanlab" else _Settings(recorder)
    )
    monkeypatch.setitem(sys.modules, request.param, module)
    PartialState(cpu=True)
    return recorder


class _Settings(dict[str, Any]):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.update = recorder.update  # type: ignore[method-assign]


def _tell(folder, name, resume_step=None) -> Trackers:
    trackers = Trackers.begin([name], "signs", folder, SETTINGS, resume_step)
    trackers.numbers(3, {"reward/mean": 0.5, "kl/k3": None, "alarm/blank": True})
    images = [np.full((4, 6, 3), 90, np.uint8)] * 2
    grid = save_image(image_grid(images, 2, CAPTIONS), folder / "samples" / "step_000003.png")
    trackers.pictures(3, grid, images, CAPTIONS)
    trackers.alarm(3, "step 3: pictures have become blank")
    trackers.table(3, ["metric", "before"], [["exact_match", "60 %"]])
    return trackers


@pytest.mark.parametrize("recorder", ["wandb", "trackio", "swanlab"], indirect=True)
def test_a_tracker_is_told_everything_and_finds_its_line_again(tmp_path, recorder, request):
    name = request.node.callspec.params["recorder"]
    trackers = _tell(tmp_path, name)
    ((_, begun),) = recorder.of("init")
    assert begun["project"] == "signs" and begun["resume"] == "allow"
    ((settings, _),) = recorder.of("update")
    assert settings[0] == {"run.steps": 4, "rewards": '[{"name": "ocr"}]'}
    logged = recorder.of("log")
    assert logged[0] == (({"reward/mean": 0.5, "alarm/blank": 1.0},), {"step": 3})
    assert [kwargs["caption"] for _, kwargs in recorder.of("Image")] == CAPTIONS
    assert any("step 3: pictures" in str(call) for call in recorder.calls)
    assert any("60 %" in str(call) for call in recorder.calls)
    trackers.finish()
    assert recorder.of("finish")

    _tell(tmp_path, name, resume_step=2)
    again = recorder.of("init")[1][1]
    assert again == begun
    _tell(tmp_path, name)  # a new run in the folder of an old one is a line of its own
    assert recorder.of("init")[2][1] != begun


@pytest.mark.parametrize("recorder", ["mlflow"], indirect=True)
def test_mlflow_goes_on_with_its_own_run(tmp_path, recorder):
    _tell(tmp_path, "mlflow").finish()
    assert recorder.of("log_metrics") == [(({"reward/mean": 0.5, "alarm/blank": 1.0},), {"step": 3})]
    ((_, kept),) = recorder.of("log_artifact")
    assert kept["local_path"].endswith("step_000003.png")
    _tell(tmp_path, "mlflow", resume_step=2)
    assert [kwargs["run_id"] for _, kwargs in recorder.of("start_run")] == [None, "run-7"]


def test_tensorboard_holds_numbers_pictures_and_words_and_forgets_the_steps_after_the_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    PartialState(cpu=True)
    first = _tell(tmp_path, "tensorboard")
    first.numbers(4, {"reward/mean": 9.0})
    first.finish()
    second = Trackers.begin(["tensorboard"], "signs", tmp_path, SETTINGS, 3)
    second.numbers(4, {"reward/mean": 0.25})
    second.finish()
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(3, 0.5), (4, 0.25)]
    (picture,) = events.Images("samples")
    assert (picture.step, picture.width) == (3, 2 * 6 + 3 * 8)
    words = {
        tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]
    }
    assert "run.steps: 4" in words["recipe/text_summary"]
    assert "blank" in words["alarms/text_summary"] and "60 %" in words["held-out/text_summary"]
    assert not [path for path in (tmp_path / "tb").iterdir() if path.is_dir()]


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLINE)
def test_a_tracker_that_is_installed_is_told_offline(tmp_path, monkeypatch, caplog, name):
    """For real, where somebody has installed it: the lock file has none of them."""
    monkeypatch.chdir(tmp_path)
    for key, value in OFFLINE[name].items():
        monkeypatch.setenv(key, value)
    pytest.importorskip(name)
    PartialState(cpu=True)
    _tell(tmp_path, name).finish()
    _tell(tmp_path, name, resume_step=2).finish()
    assert "failed" not in caplog.text


@pytest.mark.parametrize("recorder", ["wandb"], indirect=True)
def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, recorder, monkeypatch, caplog):
    trackers = _tell(tmp_path, "wandb")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(recorder, "log", fail, raising=False)
    trackers.numbers(4, {"reward/mean": 1.0})
    trackers.numbers(5, {"reward/mean": 1.0})
    assert caplog.messages == ["wandb failed and is told nothing more: no route to host"]


def test_a_tracker_that_is_not_there_or_does_not_start_is_one_line(tmp_path, monkeypatch):
    refuse_missing(["tensorboard"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ImageRLError, match=r"run\.report_to: wandb is not installed; pip install wandb, or leave"
    ):
        refuse_missing(["wandb"])
    PartialState(cpu=True)
    with pytest.raises(ImageRLError, match=r"wandb could not be started \(.*\); log in"):
        Trackers.begin(["wandb"], "signs", tmp_path, {}, None)
