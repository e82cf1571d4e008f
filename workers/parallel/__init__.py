"""The tensor-parallel process group: its collectives and how ranks join it. Knows no model and no layers."""
