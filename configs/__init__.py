"""What a run is made of: Hydra groups (YAML) and the typed schema they must satisfy."""
