#!/bin/sh
# Regenerates the committed code of the .proto files with the one version of grpcio-tools it is made with.
set -eu
cd "$(dirname "$0")/.."
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
# setuptools 80 and later lack pkg_resources, which grpcio-tools 1.72 imports
"$venv/bin/pip" install --quiet "grpcio-tools==1.72.1" "grpcio==1.72.1" "protobuf==6.30.2" "setuptools<80"
"$venv/bin/python" -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
    protos/control/v1/control.proto
