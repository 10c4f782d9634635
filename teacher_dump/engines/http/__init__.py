"""The engine that asks a teacher service on another machine."""
