"""What every method promises, over methods x layer kinds x storages; a new method is under all of it once it has an example."""
