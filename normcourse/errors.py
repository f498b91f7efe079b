"""What the course raises when input cannot be used; imports nothing."""


class CourseError(ValueError):
    """Says what is wrong and what is allowed; the command prints it and exits with 2."""


class DivergedError(CourseError):
    """The loss of a training became infinite or not a number."""
