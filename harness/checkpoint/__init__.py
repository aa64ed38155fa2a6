"""From sharded state to a committed directory of safetensors.

Read in this order: `names` (what a tensor is called), `layout` (which byte of which file it is), `shards`
(what a rank holds), `plan` (who writes what), `snapshot` (the copy, and the fence), `write` and `writer`
(to the disk, by a process of its own), `transport` and `gather` (where ranks share no disk), `board` (who
is done), `optimizer_record` and `kept_tensors` (what belongs to no parameter), `commit` (the manifest, last),
`saver` (when, and in which thread). Afterwards: `verify`, `inspect`, `export`. A resume: `resume`, `restore` (tensors),
`param_groups`, `schedules`, `restore_trainer` (all else).
"""
