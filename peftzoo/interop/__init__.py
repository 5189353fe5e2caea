"""HF PEFT both ways: its tuners as methods (`hf:TYPE`), its folders read, ours exported.

`peft_methods` makes the methods, `peft_import` reads a PEFT folder, `export` writes one, a plain LoRA or a
merged model, `lora_import` reads plain LoRA modules of either, `saved_runs` finds the adapter of a run.
"""

__all__ = ["export", "lora_import", "peft_import", "peft_methods", "saved_runs"]
