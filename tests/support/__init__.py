"""What several test modules share: tiny models, prompts, profiles, slow twins, files of benchmarks, commands."""
