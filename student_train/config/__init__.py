"""All of a training's YAML. Imports no torch."""
