"""Ray itself: joining or starting a cluster, jobs, doctor."""
