"""Scripts in the style of Accelerate's examples, which know nothing of us; `recording` is what tests compare with."""
