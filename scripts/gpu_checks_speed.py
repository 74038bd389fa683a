SPEED = ()
