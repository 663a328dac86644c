// A kubelet device plugin for tests: offers named things, interfaces of the node for example, as devices.
//
//	device-plugin RESOURCE DEVICE...
//
// A container that gets some finds them in PCIDEVICE_<RESOURCE>, as from the SR-IOV device plugin. It registers again
// when kubelet has restarted.
package main

import (
	"context"
	"log"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

type plugin struct {
	api.UnimplementedDevicePluginServer
	devices  []*api.Device
	variable string
}

func (p *plugin) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{}, nil
}

func (p *plugin) ListAndWatch(_ *api.Empty, stream api.DevicePlugin_ListAndWatchServer) error {
	if err := stream.Send(&api.ListAndWatchResponse{Devices: p.devices}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

func (p *plugin) Allocate(_ context.Context, request *api.AllocateRequest) (*api.AllocateResponse, error) {
	response := &api.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		log.Print("allocated ", container.DevicesIds)
		variables := map[string]string{p.variable: strings.Join(container.DevicesIds, ",")}
		response.ContainerResponses = append(response.ContainerResponses, &api.ContainerAllocateResponse{Envs: variables})
	}
	return response, nil
}

// serve answers kubelet on a socket of our own; kubelet removes all others' when it starts, so it is made each time.
func (p *plugin) serve(socket string) (*grpc.Server, error) {
	if err := os.RemoveAll(socket); err != nil {
		return nil, err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	server := grpc.NewServer()
	api.RegisterDevicePluginServer(server, p)
	go func() {
		if err := server.Serve(listener); err != nil {
			log.Print(err)
		}
	}()
	return server, nil
}

func register(socket, resource string) error {
	connection, err := grpc.NewClient("unix://"+api.KubeletSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	request := &api.RegisterRequest{Version: api.Version, Endpoint: filepath.Base(socket), ResourceName: resource}
	_, err = api.NewRegistrationClient(connection).Register(ctx, request)
	return err
}

func main() {
	log.SetFlags(0)
	if len(os.Args) < 3 {
		log.Fatal("usage: device-plugin RESOURCE DEVICE...")
	}
	resource := os.Args[1]
	flat := strings.NewReplacer(".", "_", "/", "_", "-", "_").Replace(resource)
	p := &plugin{variable: "PCIDEVICE_" + strings.ToUpper(flat)}
	for _, name := range os.Args[2:] {
		p.devices = append(p.devices, &api.Device{ID: name, Health: api.Healthy})
	}
	socket := api.DevicePluginPath + flat + ".sock"
	var server *grpc.Server
	for ; ; time.Sleep(time.Second) {
		if _, err := os.Stat(socket); err == nil {
			continue
		}
		if server != nil {
			server.Stop()
		}
		var err error
		if server, err = p.serve(socket); err != nil {
			log.Fatal(err)
		}
		if err := register(socket, resource); err != nil {
			log.Print(err, "; trying again")
			os.Remove(socket)
			continue
		}
		log.Print("registered ", resource, " ", os.Args[2:])
	}
}
