"""Device-side training: data, adapters' parameters, optimizer, checkpoints and events of a job."""
