"""What every method promises, over methods x layer kinds x storages."""
