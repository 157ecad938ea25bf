"""The parts of `PagedKeyCache`: who holds which page, and the memory of the pages."""
