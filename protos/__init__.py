"""The wire: .proto files and the code generated from them. Imports nothing but grpc and protobuf."""
