"""Complete configurations by name: the only place that names concrete things together."""

from fastskel.recipes.usdrl import RECIPES, USDRLRecipe

__all__ = ["RECIPES", "USDRLRecipe"]
