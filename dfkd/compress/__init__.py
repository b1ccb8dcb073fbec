"""Whatever makes a model smaller, fed by the stream."""
