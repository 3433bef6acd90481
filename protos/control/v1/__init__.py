"""Version 1 of the control service: generated code, not edited by hand (``protos/generate.sh``)."""
