"""Pretraining: the student/teacher pair, optimizer, schedules and the loop around them."""
