"""Complete configurations by name: the only place that names concrete things together."""

from fastskel.recipes.usdrl import LINEAR_RATES, RECIPES, USDRLRecipe

__all__ = ["LINEAR_RATES", "RECIPES", "USDRLRecipe"]
