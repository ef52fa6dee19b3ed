"""Pictures of head profiles."""

from headprof.plots.heads import heatmap

__all__ = ["heatmap"]
