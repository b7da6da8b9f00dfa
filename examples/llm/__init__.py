"""Continual fine-tuning of pretrained language models.

smollm2.py      the default model: fetched, checked, converted, cached
conversion.py   GGUF -> Hugging Face files
families.py     config.json -> sizes of Tunix's models
rotary.py       rotary positions as config.json asks for them
models.py       folders of Hugging Face files -> functions of trees, with LoRA
tiny.py         a random model of the same code path
"""
