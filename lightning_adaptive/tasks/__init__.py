"""Small real models and data that the recipes train."""
