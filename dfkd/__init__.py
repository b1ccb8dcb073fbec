"""dfkd: data-free model compression from trained classifiers alone."""
