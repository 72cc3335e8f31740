"""One search from start to end: prepare, explore, finish; and its folder."""
