"""One line for a script that knows nothing of us: what it does through accelerate is logged and saved as it trains.

Read in this order: `api` (what one calls), `switch` (on and off; what is replaced in accelerate, and why), `trainings`
(which of a process's trainings runs, and how its run is called), `session` (one training, from what was prepared to its
end), `passes` (one iteration over a loader: training or not), `replay` (epochs that are done already go by again),
`pass_end` (a stop within the evaluation behind a pass),
`saved_states` (what the script itself saves meanwhile), `script` (what was prepared, and with which values), `fluent`
(what the script logs to MLflow itself), `other_ranks` (that it does so on rank zero alone),
`summary_writers` (what it gives to TensorBoard, where MLflow listens), `ending` (how the script ends).
"""
