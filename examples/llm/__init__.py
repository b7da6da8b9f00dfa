"""Continual fine-tuning of pretrained language models.

smollm2.py      the default model: fetched, checked, converted, cached
conversion.py   GGUF -> Hugging Face files
families.py     config.json -> sizes of Tunix's models
folders.py      config.json, and what the weights' headers must have
rotary.py       rotary positions as config.json asks for them
models.py       folders of Hugging Face files -> functions of trees, with LoRA
generate.py     greedy answers to batches of prompts
tiny.py         a random model of the same code path
"""
