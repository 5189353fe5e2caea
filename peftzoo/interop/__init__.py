"""Interoperability with HF PEFT: its tuners as methods (`hf:TYPE`), import and export of its adapters.

`peft_methods` makes the methods, `peft_import` reads a PEFT adapter folder, `export` writes a PEFT adapter, a
plain LoRA or a merged model, `lora_import` reads plain LoRA adapters of both libraries, `saved_runs` loads
the saved adapter of a run.
"""

__all__ = ["export", "lora_import", "peft_import", "peft_methods", "saved_runs"]
