"""Speed and memory of decoding with compressed caches, beside Transformers' own full caches, in one run."""

from headprof.bench.generate.largest_batch import LargestBatch, beside_full, largest_batches
from headprof.bench.generate.request import BenchRequest
from headprof.bench.generate.results import BenchResult, Comparison, Measurement, comparison, figures
from headprof.bench.generate.run import run_bench

__all__ = [
    "BenchRequest",
    "BenchResult",
    "Comparison",
    "LargestBatch",
    "Measurement",
    "beside_full",
    "comparison",
    "figures",
    "largest_batches",
    "run_bench",
]
