"""From sharded state to a committed directory of safetensors.

Read in this order: `names` (what a tensor is called), `layout` (which file it goes into), `gather`
(the full state on rank zero), `write` (files, in the background), `commit` (the manifest, last),
`saver` (when, and who does what).
"""
