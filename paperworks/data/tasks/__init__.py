"""Inputs of tasks: fine-tuning layouts, masking, span corruption."""
