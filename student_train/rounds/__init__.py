"""Rounds: the student answers, the teacher scores, the student learns, again; as processes."""
