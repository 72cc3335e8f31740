"""Which tile is fastest: trials, timers, the store of what was found."""
