"""What the engine takes on this machine, beside what a user would run instead. `minipaged bench` is the way in."""
