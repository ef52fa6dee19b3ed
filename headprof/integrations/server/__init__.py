"""An OpenAI-compatible server: plain prompts and saved documents, answered together from compressed caches."""
