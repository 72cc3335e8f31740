"""Related models of one architecture in one model that holds much of their weights once."""
