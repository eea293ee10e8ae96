// An HTTP server in Go that loses nothing when zddsup upgrades it.
//
//	go build -o server examples/go/main.go
//	zddsup run --listen 8080 --ready notify -- ./server
//
// It takes its listener by LISTEN_FDS, says READY=1, and on SIGTERM stops accepting, answers what it has with
// `Connection: close`, and exits with its last connection. Started alone it binds port 8080 of the loopback address.
package main

import (
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

func listener() (net.Listener, error) {
	count, _ := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid()) && count > 0 {
		return net.FileListener(os.NewFile(3, "listener"))
	}
	return net.Listen("tcp", "127.0.0.1:8080")
}

// notify is sd_notify(3); nothing where nobody asked for it.
func notify(message string) {
	address := os.Getenv("NOTIFY_SOCKET")
	if address == "" {
		return
	}
	connection, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		return
	}
	defer connection.Close()
	connection.Write([]byte(message))
}

func main() {
	l, err := listener()
	if err != nil {
		log.Fatal(err)
	}
	var draining int32
	var open sync.WaitGroup
	version := os.Getenv("VERSION")
	server := &http.Server{
		IdleTimeout: 10 * time.Second,
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				open.Add(1)
			case http.StateClosed, http.StateHijacked:
				open.Done()
			}
		},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if atomic.LoadInt32(&draining) == 1 {
				// The client opens its next connection to the new generation.
				w.Header().Set("Connection", "close")
			}
			fmt.Fprintf(w, "version=%s pid=%d generation=%s\n", version, os.Getpid(), os.Getenv("ZDDSUP_GENERATION"))
		}),
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	notify("READY=1")
	<-stop
	atomic.StoreInt32(&draining, 1)
	// Not Shutdown: that one also closes idle connections, on which a request may be under way.
	l.Close()
	<-served
	open.Wait()
}
