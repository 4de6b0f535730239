"""Every command through `main`: what it prints, leaves behind and returns, and how it refuses."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastskel import cli
from fastskel.cli import main
from fastskel.data import make_synthetic, open_dataset, pack_arrays
from fastskel.data.formats import FORMATS, PREPARED
from fastskel.objectives import MGFD
from fastskel.recipes import RECIPES, USDRLRecipe

# a training of six steps of a tenth of a second
SMALL_OPTIONS = (
    "--width 16 --frames 16 --crop-min-frames 16 --num-views 2 --batch-size 6 --epochs 2 --milestones 1 "
    "--threads 1 --device cpu --quiet"
)
SMALL = SMALL_OPTIONS.split()
COMMANDS = ("pack", "unpack", "convert", "info", "show", "check", "pretrain", "evaluate", "report", "export", "demo", "bench")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packed data set `data` and the finished run `run` over it; only to be read."""
    folder = tmp_path_factory.mktemp("cli")
    make_synthetic(folder / "data", num_clips=32, num_classes=3, num_subjects=4)
    command = ["pretrain", "usdrl-demo", str(folder / "data"), "--protocol", "xsub", "--out", str(folder / "run")]
    # compute threads are the whole process's: give them back
    threads = torch.get_num_threads()
    assert main([*command, *SMALL]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def here(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own working folder with a copy of `run`, and `data` beside it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workplace / "run", tmp_path / "run")
    (tmp_path / "data").symlink_to(workplace / "data")
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Run a command that must fail; returns its one line on standard error."""
    capsys.readouterr()
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.endswith("\n") and error.count("\n") == 1, error
    assert "Traceback" not in error
    return error


def test_help(capsys) -> None:
    for flag in ("-h", "--help"):
        assert main([flag]) == 0
        text = capsys.readouterr().out
        assert [name for name in COMMANDS if not re.search(rf"^  {name}\b", text, re.MULTILINE)] == []
    assert main([]) == 2
    assert "usage: fastskel COMMAND" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert re.fullmatch(r"fastskel \d+\.\d+\.\d+.*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "command, words",
    [
        ("info", ["DATA", "--verify"]),
        ("convert", ["DATA", "DST", "--to", "--quiet", "normalised when packed are refused"]),
        ("show", ["DATA", "CLIP", "--out"]),
        ("check", ["DATA", "--protocol", "--split-file", "--json", "--picture", "--crop", "--fail-on", "--quiet"]),
        ("export", ["RUN", "--to", "--out"]),
        ("demo", ["--out", "--seed", "--quick"]),
        ("pack", ["nw-ucla", "utd-mhad", "agcn", "pyskl", "--list-formats"]),
        ("unpack", ["agcn", "ctr-gcn", "pyskl"]),
        ("pretrain", list(RECIPES)),
        ("evaluate", ["knn", "linear", "detect", "segment"]),
        ("pack utd-mhad", ["SRC", "DST", "--quiet"]),
        ("pack pyskl", ["SRC", "DST", "--quiet", "--dataset", "--topology", "--third", "--usdrl-scaling"]),
        ("unpack agcn", ["DATA", "DST", "--protocol", "--frames", "--bodies"]),
        ("evaluate knn", ["RUN", "DATA", "--protocol", "--split-file", "--normalise", "--k "]),
        ("evaluate linear", ["RUN", "DATA", "--protocol", "--learning-rate", "--epochs", "--seed"]),
        ("evaluate detect", ["RUN", "DATA", "--leave-one-out", "--head", "--overlap", "--thresholds", "--nms"]),
        ("evaluate segment", ["RUN", "DATA", "--leave-one-out", "--head", "--overlap", "--smoothing", "--protocol"]),
    ],
)
def test_help_of_commands(capsys, command, words) -> None:
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: fastskel {command}" in text
    assert [word for word in words if word not in text] == []
    assert "{None}" not in text and "--no-" not in text


def test_evaluations_take_their_own_options_only(capsys) -> None:
    main(["evaluate", "knn", "--help"])
    assert "--learning-rate" not in capsys.readouterr().out
    main(["evaluate", "linear", "--help"])
    assert "--k " not in capsys.readouterr().out


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_help_of_recipes_is_complete(capsys, recipe) -> None:
    assert main(["pretrain", recipe, "--help"]) == 0
    text = capsys.readouterr().out
    defaults = RECIPES[recipe]()
    assert (RECIPES[recipe].__doc__ or "?").splitlines()[0][:60] in text
    # option -> everything said of it, in one line without the frame
    blocks = {}
    for block in re.split(r"^\W*(?=--)", text, flags=re.MULTILINE)[1:]:
        blocks[block.split()[0]] = " ".join(re.sub(r"[│╭╰─╮╯]", " ", block).split())
    documented = dict(re.findall(r"^ {4}(\w+): (.+?)$", inspect.getdoc(USDRLRecipe) or "", re.MULTILINE))
    for field in dataclasses.fields(USDRLRecipe):
        said = blocks[f"--{field.name.replace('_', '-')}"]
        value = getattr(defaults, field.name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert f"(default: {shown})" in said
        assert documented[field.name] in said
    for option in ("out", "protocol", "split-file", "resume", "device", "threads", "tensorboard", "quiet"):
        assert len(blocks[f"--{option}"].split()) > 5
    assert f"runs/{recipe}-DATA-SEED" in blocks["--out"]


def test_unknown_names(capsys) -> None:
    error = refused(capsys, "pretrian")
    assert error.startswith("error: fastskel: COMMAND must be one of pack, unpack, convert, info,")
    assert "got 'pretrian'. Did you mean pretrain?" in error
    error = refused(capsys, "pretrain", "usdrl-smal", "data")
    assert "RECIPE must be one of usdrl-demo," in error and "Did you mean usdrl-small" in error
    assert "got none. See fastskel pretrain --help." in refused(capsys, "pretrain")
    assert "got '--epochs'" in refused(capsys, "pretrain", "--epochs", "3", "usdrl-small", "data")
    known = ", ".join([*FORMATS, *PREPARED])
    assert f"SOURCE must be one of {known}, got 'imagenet'" in refused(capsys, "pack", "imagenet", "a", "b")
    error = refused(capsys, "evaluate", "knm")
    assert "TASK must be one of knn, linear, " in error and "got 'knm'. Did you mean knn?" in error


@pytest.mark.parametrize(
    "command, words",
    [
        ("pretrain usdrl-small data --epoch 3", ["--epoch", "--epochs INT", "fastskel pretrain usdrl-small --help"]),
        ("pretrain usdrl-small data --epochs many", ["--epochs", "many"]),
        ("pretrain usdrl-small", ["DATA"]),
        ("pretrain usdrl-small data --encoder gru", ["--encoder", "dste", "sttr"]),
        ("evaluate knn run", ["DATA"]),
        ("evaluate knn run data --epochs 3", ["--epochs"]),
        ("export run out --to pyskl", ["usdrl"]),
    ],
)
def test_wrong_options(capsys, command, words) -> None:
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert [word for word in words if word not in error] == []
    assert "Traceback" not in error


def test_pretrain_names_its_run(here, capsys) -> None:
    assert main(["pretrain", "usdrl-demo", "data/.", "--seed", "3", *SMALL]) == 0
    output = capsys.readouterr()
    run = Path("runs") / "usdrl-demo-data-3"
    # 32 clips in batches of 6, twice
    assert output.out == f"trained 2 epochs; the run is {run}, its last checkpoint {run}/checkpoints/step-000000010\n"
    assert output.err == ""
    config = json.loads((run / "config.json").read_text())
    assert config["recipe"]["name"] == "usdrl-demo" and config["recipe"]["protocol"] is None
    stage = config["identity"]["stage"]
    assert (stage["epochs"], stage["batch_size"], stage["milestones"], stage["seed"]) == (2, 6, [1], 3)
    assert stage["encoder_options"]["width"] == 16 and len(stage["views"]) == 2
    assert config["identity"]["indices"] is None


def test_pretrain_trains_on_the_training_part(here, capsys) -> None:
    config = json.loads(Path("run", "config.json").read_text())
    train = open_dataset("data").splits["xsub"]["train"]
    assert config["recipe"]["protocol"] == "xsub"
    assert config["identity"]["indices"]["num"] == len(train) < 32
    Path("mine.json").write_text(
        json.dumps({"train": train.tolist(), "test": [int(set(range(32)).difference(train).pop())]})
    )
    command = ["pretrain", "usdrl-demo", "data", "--split-file", "mine.json", "--out", "own", *SMALL]
    assert main(command) == 0
    assert json.loads(Path("own", "config.json").read_text())["identity"]["indices"] == config["identity"]["indices"]
    both = [*command, "--protocol", "xsub"]
    assert "protocol or split_file must be given, got both" in refused(capsys, *both)


def test_pretrain_shows_its_progress(here, capsys) -> None:
    loud = [argument for argument in SMALL if argument != "--quiet"]
    assert main(["pretrain", "usdrl-demo", "data", *loud]) == 0
    shown = capsys.readouterr().err
    assert "10/10" in shown and "samples_per_s=" in shown and "loss=" in shown


def test_resume(here, capsys, monkeypatch) -> None:
    command = [
        "pretrain",
        "usdrl-demo",
        "data",
        "--protocol",
        "xsub",
        "--out",
        "again",
        *SMALL,
        "--checkpoint-steps",
        "1",
    ]
    left = [3]

    def interrupt(self: MGFD) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(MGFD, "after_step", interrupt)
    assert refused(capsys, *command, code=130) == "interrupted; it goes on with --resume\n"
    assert sorted(path.name for path in Path("again/checkpoints").iterdir()) == ["step-000000001", "step-000000002"]
    assert "must be new, got the folder of another run. Resume it" in refused(capsys, *command)
    assert "got other lr than in" in refused(capsys, *command, "--resume", "--lr", "1")
    assert main([*command, "--resume"]) == 0
    last = sorted(Path("again/checkpoints").iterdir())[-1]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (last / name).read_bytes() == (Path("run/checkpoints") / last.name / name).read_bytes()
    # once more: there is nothing left to do
    assert main([*command, "--resume"]) == 0
    assert "no config.json" in refused(capsys, *command, "--resume", "--out", "nothing")


def test_a_stopped_training_is_code_3(here, capsys) -> None:
    command = ["pretrain", "usdrl-demo", "data", *SMALL, "--lr", "1e30", "--out", "wild"]
    assert refused(capsys, *command, code=3).startswith("stopped: pretrain: the loss and its gradient must stay finite")


@pytest.mark.parametrize(
    "command", [["pretrain", "usdrl-demo", "data"], ["evaluate", "knn", "run", "data"]], ids=" ".join
)
def test_bad_protocols_and_devices(here, capsys, command) -> None:
    error = refused(capsys, *command, "--protocol", "xset")
    assert "protocol must be one of those for 'synthetic' (xsub, xview), got 'xset'" in error
    error = refused(capsys, *command, "--protocol", "xsub", "--device", "toaster")
    assert "device must be one this machine has, got 'toaster'" in error
    (here / "split.json").write_text('{"train": ["nobody"], "test": [1]}')
    assert "the clip 'nobody'" in refused(capsys, *command, "--split-file", "split.json")
    assert not Path("runs").exists()


@pytest.mark.parametrize("task, options", [("knn", ["--k", "3"]), ("linear", ["--epochs", "3", "--seed", "1"])])
def test_evaluate_a_run(here, capsys, task, options) -> None:
    assert main(["evaluate", task, "run", "data", "--protocol", "xsub", "--quiet", *options]) == 0
    output = capsys.readouterr()
    parts = open_dataset("data").splits["xsub"]
    place = f"run/{task}-xsub-data" + ("-k3" if "--k" in options else "-epochs3-seed1")
    sizes = f"{len(parts['train'])} train, {len(parts['test'])} test clips; {place}"
    assert re.fullmatch(rf"top1 [\d.]+ %  top5 [\d.]+ %  mean_class [\d.]+ %   \({sizes}\)\n", output.out)
    assert output.err == ""
    folder = Path(place)
    assert sorted(path.name for path in folder.iterdir()) == ["confusion.csv", "confusion.png", "results.json"]
    results = json.loads((folder / "results.json").read_text())
    assert (results["task"], results["protocol"], results["run"]) == (task, "xsub", "run")
    if task == "knn":
        assert results["k"] == 3
    else:
        assert (results["config"]["epochs"], results["config"]["seed"]) == (3, 1)


def test_evaluate_a_checkpoint_leaves_it_as_it_is(here, capsys) -> None:
    folder = sorted(Path("run/checkpoints").iterdir())[-1]
    before = sorted(path.name for path in folder.iterdir())
    assert main(["evaluate", "knn", str(folder), "data", "--protocol", "xview", "--quiet"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (here / "run" / f"{folder.name}-results" / "knn-xview-data" / "results.json").exists()


def test_export_and_evaluate_a_published_file(here, capsys) -> None:
    assert main(["export", "run", "--to", "usdrl", "--out", "weights.pth.tar"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "weights.pth.tar"
    assert "out must be new, got the existing weights.pth.tar" in refused(capsys, "export", "run", "--out", "weights.pth.tar")
    found = []
    # the file does not say how clips were normalised: told so, it gives what the run gives
    for source in (["run"], ["weights.pth.tar", "--normalise", "center"]):
        assert main(["evaluate", "knn", source[0], "data", "--protocol", "xsub", *source[1:], "--quiet"]) == 0
        found.append(capsys.readouterr().out.splitlines()[-1].split("(")[0])
    assert found[0] == found[1]
    assert Path("weights.pth.tar-results/knn-xsub-data-center/results.json").exists()


def test_evaluate_refuses(here, capsys) -> None:
    error = refused(capsys, "evaluate", "knn", "run", "data")
    assert "protocol or split_file must be given, got neither. Protocols of data: xsub, xview." in error
    options = ["data", "--protocol", "xsub", "--quiet"]
    assert "got nothing without" in refused(capsys, "evaluate", "knn", "nothing", *options).replace(
        "nothing/", "nothing"
    )
    (here / "fake.pth.tar").write_bytes(b"not a checkpoint")
    assert "fake.pth.tar" in refused(capsys, "evaluate", "linear", "fake.pth.tar", *options)
    assert "state.json" in refused(capsys, "export", "data", "--out", "out.pth.tar")
    assert "k must lie in" in refused(capsys, "evaluate", "knn", "run", *options, "--k", "1000")
    assert not (here / "out.pth.tar").exists()


def test_demo_quick(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--quick", "--out", "demo"]) == 0
    text = capsys.readouterr().out
    for words in ("raw coordinates", "untrained encoder", "pretrained encoder", "next, on your own data"):
        assert words in text
    results = json.loads(Path("demo/results.json").read_text())
    assert set(results["accuracy"]) == {"raw coordinates", "untrained encoder", "pretrained encoder"}
    pictures = sorted(path.name for path in Path("demo/pictures").iterdir())
    assert {"embedding.png", "training.png"} <= set(pictures) and sum(name.endswith(".gif") for name in pictures) == 4
    # every command that the demo advises is one
    advised = re.findall(r"^  fastskel (.*?)(?:  .*)?$", text, re.MULTILINE)
    assert [line.split()[0] for line in advised] == ["pack", "pretrain", "evaluate"]
    assert "out must be new, got the existing demo" in refused(capsys, "demo", "--out", "demo")


def test_python_m_fastskel(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastskel", "info", "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("error: open_dataset") and done.stderr.count("\n") == 1


# with -u it is a print that fails, without what flushes the buffer
@pytest.mark.parametrize("command", ["-m fastskel --version", "-m fastskel check --help", "-u -m fastskel info data"])
def test_a_reader_that_stops_reading_is_no_error(tmp_path, command) -> None:
    make_synthetic(tmp_path / "data", num_clips=4)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        done = subprocess.run(
            [sys.executable, *command.split()], cwd=tmp_path, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    "task, words, message",
    [
        ("finetune", "--label-smoothing 2", "FinetuneConfig: label_smoothing must be in 0 .. 1, got 2.0. Choose another."),
        ("segment", "--overlap 2", "Windows: overlap must lie in [0, 1), got 2.0. Pass 0.5."),
        ("detect", "--nms 2", "ProposalConfig: nms must lie in [0, 1), got 2.0. Pass 0.5."),
    ],
)
def test_settings_that_refuse_their_values_are_errors_of_one_line(task, words, message, capsys) -> None:
    assert main(["evaluate", task, "run", "data", *words.split()]) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_what_is_wrong_with_an_option_names_it(capsys) -> None:
    assert main(["evaluate", "finetune", "run", "data", "--epochs", "x"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("Error parsing --epochs: invalid literal") == 1
    assert main(["evaluate", "finetune", "--help"]) == 0
    assert capsys.readouterr().out.count("Train the encoder further") == 1


def test_another_pipe_that_breaks_is_an_error(monkeypatch, capfd) -> None:
    def info() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb", buffering=0) as child:
            child.write(b"to a child that has gone")

    monkeypatch.setitem(cli.COMMANDS, "info", info)
    assert main(["info"]) == 2
    assert capfd.readouterr().err == "error: [Errno 32] Broken pipe\n"
    print("and nothing is lost afterwards")
    assert capfd.readouterr().out == "and nothing is lost afterwards\n"


def test_what_a_published_file_does_not_record_can_be_given(here, capsys) -> None:
    assert main(["export", "run", "--out", "other.pth.tar"]) == 0
    options = ["data", "--protocol", "xsub", "--quiet", "--modality", "motion", "--gap", "2"]
    capsys.readouterr()
    assert main(["evaluate", "knn", "other.pth.tar", *options]) == 0
    said = capsys.readouterr().out
    assert "modality=motion" in said and "gap=2" in said and "alpha=0.5 (assumed)" in said
    assert "modality, gap must be left out, run records them" in refused(capsys, "evaluate", "knn", "run", *options)


def test_test_clips_that_were_trained_on_are_counted(here, capsys) -> None:
    assert main(["pretrain", "usdrl-demo", "data", "--out", "all", *SMALL]) == 0
    capsys.readouterr()
    assert main(["evaluate", "knn", "all", "data", "--protocol", "xsub", "--quiet"]) == 0
    clips = len(open_dataset("data").splits["xsub"]["test"])
    assert f"warning: {clips} of {clips} test clips were trained on" in capsys.readouterr().err
    results = json.loads(Path("all/knn-xsub-data/results.json").read_text())
    assert results["test_clips_trained_on"] == clips


def test_data_of_another_skeleton_is_refused(here, capsys) -> None:
    draw = np.random.default_rng(0)
    clips = [draw.normal(size=(20, 1, 20, 3)).astype(np.float32) for _ in range(12)]
    parts = {"xsub": {"train": range(6), "test": range(6, 12)}}
    for name in ("kinect-20-ucla", "kinect-20-utd"):
        pack_arrays(clips, out=name, topology=name, labels=[0, 1] * 6, splits=parts)
    assert main(["pretrain", "usdrl-demo", "kinect-20-ucla", "--protocol", "xsub", "--out", "ucla", *SMALL]) == 0
    error = refused(capsys, "evaluate", "knn", "ucla", "kinect-20-utd", "--protocol", "xsub", "--quiet")
    assert "made for clips like those of kinect-20-utd, got skeleton kinect-20-ucla for kinect-20-utd" in error
