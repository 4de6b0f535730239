"""Settings of a recipe that a comparison of accuracies changes, and the rows of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastskel.bench import accuracy

from fastskel.data import make_synthetic
from fastskel.recipes import RECIPES

RECIPE = RECIPES["usdrl-small"]()


def test_settings_are_read_as_what_they_look_like() -> None:
    recipe = accuracy.changed(RECIPE, ["batch_size=64", "lr_scaling=sqrt", "milestones=(3, 4)", "lr=1e-2"], 1020)
    assert (recipe.batch_size, recipe.lr_scaling, recipe.milestones, recipe.lr) == (64, "sqrt", (3, 4), 0.01)
    assert recipe.warmup_steps == RECIPE.warmup_steps
    assert accuracy.changed(RECIPE, [], 1020) == RECIPE


def test_the_whole_training_part_is_one_batch_and_a_share_of_its_steps_warms_up() -> None:
    recipe = accuracy.changed(RECIPE, ["batch_size=whole", "warmup_steps=0.1"], 1020)
    assert (recipe.batch_size, recipe.warmup_steps) == (1020, 6)
    assert accuracy.changed(RECIPE, ["batch_size=64", "warmup_steps=0.1"], 1020).warmup_steps == 60 * 15 // 10


@pytest.mark.parametrize("setting", ["batch_size", "batches=3", "=3"])
def test_other_settings_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match="accuracy: set must be name=value of .* Name a setting."):
        accuracy.changed(RECIPE, [setting], 1020)


def test_rows_say_what_was_trained(tmp_path: Path) -> None:
    make_synthetic(tmp_path / "data", num_clips=24, num_classes=3, num_subjects=4)
    settings = ["batch_size=whole", "epochs=2", "width=16", "frames=16", "warmup_steps=0.5", "milestones=()", "precision=fp32"]

    def rows() -> list[dict]:
        return accuracy.measure(
            "usdrl-small", tmp_path / "data", 0, "xsub", ["xsub"], tmp_path / "runs", False, settings, "whole"
        )

    found = rows()
    assert [row["features"] for row in found][-1] == "pretrained encoder"
    assert {(row["tag"], row["train_steps"], row["recipe"]["warmup_steps"]) for row in found} == {("whole", 2, 1)}
    assert all(row["train_cpu_s"] > 0 and row["final_loss"] > 0 for row in found)
    # what is there is not trained again, and its time is not known
    again = rows()
    assert again[0]["train_cpu_s"] is None
    assert [row["knn_top1"] for row in again] == [row["knn_top1"] for row in found]
    assert "pretrained encoder whole" in accuracy.table(found)
