"""What is on disk; the only place that knows other projects' names.

An adapter folder holds three files.  The first two are Hugging Face PEFT's wherever that project has the method:

    adapter_config.json          the method and its settings
    adapter_model.safetensors    the tensors
    smidgen.json                 what only we know: resolved places, base fingerprint, checksums, extra

    write.py          a model's adapters -> folder              layout.py        keys and shapes of the tensors in our own layout
    read.py           folder -> what a model's adapters need    translation.py   how a method says its layout, and that of HF PEFT
    note.py           smidgen.json                              peft_<...>.py    the methods that HF PEFT has

A method that HF PEFT lacks needs nothing here: its `DiskNames` is enough, see `translation.py`.
"""
