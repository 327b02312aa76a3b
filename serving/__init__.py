"""The model behind a socket: robots ask, one process with the accelerator answers.

`contract` says what a request, an answer and a refusal are. `model` answers requests by an OpenVLA model, `engine`
gathers them into batches, `wire` and `names` read what comes from outside, within `options.serving.Limits`, `rest` and
`websocket` are what clients speak, `app` puts it together, `server` listens.
"""
