"""Recipes of the published settings: what each becomes, against the constants of the two codes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest

from fastskel.cli import main
from fastskel.cli_evaluate import frozen
from fastskel.data.transforms import JointCorruption, OneOf, Shear
from fastskel.evaluate import LinearConfig
from fastskel.models import ENCODERS
from fastskel.recipes import LINEAR_RATES, RECIPES, USDRLRecipe
from fastskel.train import Stage

# recipe -> joints, batch, epochs, milestone, learning rate, weighting
PUBLISHED = {
    "usdrl-dste": (25, 356, 451, 351, 5e-4, "aaai"),
    "usdrl-sttr": (25, 356, 451, 351, 5e-4, "aaai"),
    "usdrl-dste-journal": (25, 356, 451, 351, 1e-4, "journal"),
    "usdrl-sttr-journal": (25, 356, 451, 351, 1e-4, "journal"),
    "usdrl-dste-pku": (25, 512, 1201, 801, 5e-4, "aaai"),
    "usdrl-sttr-pku": (25, 512, 1201, 801, 5e-4, "aaai"),
    "usdrl-dste-2d": (17, 384, 451, 351, 1e-4, "journal"),
    "usdrl-sttr-2d": (17, 384, 451, 351, 1e-4, "journal"),
    "usdrl-dste-uav": (17, 356, 451, 351, 1e-4, "journal"),
    "usdrl-sttr-uav": (17, 356, 451, 351, 1e-4, "journal"),
    "usdrl-dste-multimodal": (25, 356, 451, 351, 1e-4, "journal"),
    "usdrl-sttr-multimodal": (25, 356, 451, 351, 1e-4, "journal"),
}


def stage_of(recipe: USDRLRecipe, joints: int = 25) -> Stage:
    (stage,) = recipe.stages(SimpleNamespace(frames=SimpleNamespace(shape=(0, 2, joints, 3))))
    return stage


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_constants(name) -> None:
    joints, batch, epochs, milestone, lr, weighting = PUBLISHED[name]
    stage = stage_of(RECIPES[name](), joints)
    assert (stage.batch_size, stage.epochs, stage.milestones, stage.lr) == (batch, epochs, (milestone,), lr)
    # scaling leaves the rate of the published batch alone
    assert RECIPES[name]().base_batch_size == batch
    assert (stage.optimizer, stage.weight_decay, stage.lr_factor) == ("adam", 1e-5, 0.1)
    assert (stage.clip_norm, stage.warmup_steps, stage.schedule) == (0, 0, "step")
    assert stage.objective_options["weighting"] == weighting
    options = stage.encoder_options
    assert [options[f"num_{key}"] for key in ("joints", "bodies", "frames", "channels")] == [joints, 2, 64, 3]
    assert (options["width"], options["num_heads"], options["num_layers"]) == (1024, 1, 2)
    # torch's own start is that of the journal's STTR alone, encoder and projectors
    drawn = "torch" if weighting == "journal" and "sttr" in name else "usdrl"
    assert [part.get("init", "usdrl") for part in (options, stage.objective_options)] == [drawn] * 2
    kind = "dste" if "dste" in name else "sttr"
    multimodal = "-multimodal" if name.endswith("multimodal") else ""
    assert (stage.encoder, stage.objective) == (f"usdrl-{kind}{multimodal}", f"mgfd{multimodal}")
    assert stage.encoder in ENCODERS
    assert len(stage.views) == 4 and {view.stream for view in stage.views} == {"joint"}
    (oneof,) = stage.views[0].transforms
    assert oneof == OneOf((JointCorruption(15 / 17 if joints == 17 else 0.6), Shear(1.0)))
    # both codes corrupt 15
    assert oneof.options[0].num_joint_words(joints) == 15


def test_every_recipe_of_published_size_is_in_the_table() -> None:
    assert {name for name in RECIPES if RECIPES[name]().width == 1024} == PUBLISHED.keys()


def test_help_names_the_settings() -> None:
    lines = {name: (RECIPES[name].__doc__ or "") for name in PUBLISHED}
    for words, count in {"NTU-60 (xsub, xview)": 6, "NTU-120 (xsub, xset)": 6, "PKU-MMD II": 2, "2-D": 2, "UAV-Human": 2}.items():
        assert sum(words in line for line in lines.values()) == count
    assert all(line.startswith("DSTE" if "dste" in name else "STTR") for name, line in lines.items())
    assert len(set(lines.values())) == len(lines)


def test_linear_evaluation_takes_the_published_step_size(monkeypatch, capsys) -> None:
    assert get_args(frozen.Setting) == tuple(LINEAR_RATES)
    seen = []
    monkeypatch.setattr(frozen, "prepare", lambda *given: (None, None))
    monkeypatch.setattr(frozen, "say", lambda *given: None)
    monkeypatch.setattr("fastskel.evaluate.evaluate_linear", lambda *given, config: seen.append(config))
    assert main(["evaluate", "linear", "run", "data", "--published", "ntu60-xview"]) == 0
    assert seen == [LinearConfig(learning_rate=0.03, standardise=False, epochs=160)]
    assert main(["evaluate", "linear", "run", "data", "--published", "pku2-xsub", "--learning-rate", "1"]) == 2
    assert "learning_rate or published must be given, got both" in capsys.readouterr().err


def test_bones_of_a_variant_reach_every_view() -> None:
    recipe = replace(RECIPES["usdrl-dste-2d"](), stream="bone")
    stage = stage_of(recipe, 17)
    assert {(view.stream, view.bone_variant) for view in (*stage.views, stage.eval_view)} == {("bone", "usdrl")}
    stage = stage_of(replace(RECIPES["usdrl-dste-2d"](), consistency="multi-modal"), 17)
    assert stage.encoder_options["bone_variant"] == "usdrl"


def test_what_older_runs_were_made_of_did_not_change() -> None:
    """A run records its stage: names that appeared since must not be in those of before."""
    stage = stage_of(RECIPES["usdrl-sttr"]())
    assert stage.encoder_options.keys() == {
        "num_joints", "num_bodies", "num_frames", "num_channels", "width", "num_heads", "num_layers",
    }  # fmt: skip
    assert stage.objective_options == {"weighting": "aaai"}
