"""What is on disk; the only place that knows other projects' names.

An adapter folder holds three files.  The first two are Hugging Face PEFT's wherever that project has the method:

    adapter_config.json          the method and its settings
    adapter_model.safetensors    the tensors
    smidgen.json                 what only we know: resolved places, base fingerprint, checksums, extra

    write.py         a model's adapters -> folder
    read.py          folder -> what a model's adapters need; opened.py and checks.py are its parts
    config.py        adapter_config.json
    note.py          smidgen.json
    layout.py        keys of the tensors in our own layout
    translation.py   what a method says of its layout, and of HF PEFT's
    peft_<...>.py    the methods that HF PEFT has

A method that HF PEFT lacks needs nothing here: its `DiskNames` is enough, see `translation.py`.
"""
