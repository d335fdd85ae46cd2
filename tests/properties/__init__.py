"""Properties that hold for every input, on examples that hypothesis draws and shrinks."""
