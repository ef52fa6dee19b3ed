"""Speed and memory of decoding with compressed caches, beside Transformers' own full cache, in one run."""

from headprof.bench.generate.largest_batch import LargestBatch, largest_batches
from headprof.bench.generate.request import BenchRequest
from headprof.bench.generate.results import BenchResult, Comparison, Measurement, comparison
from headprof.bench.generate.run import run_bench

__all__ = [
    "BenchRequest",
    "BenchResult",
    "Comparison",
    "LargestBatch",
    "Measurement",
    "comparison",
    "largest_batches",
    "run_bench",
]
