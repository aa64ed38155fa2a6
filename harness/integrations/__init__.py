"""Other people's loops, over the same core: each module needs its own framework, and no other module imports it."""
